"""Programs that ask a server which `accessory serve` started. They know nothing of the package, only of HTTP."""

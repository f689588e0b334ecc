"""Programs to start from. They are no part of the package: each imports `accessory` as any user would."""

"""Programs to start from. They are not part of the package: each imports `accessory` as any user would."""

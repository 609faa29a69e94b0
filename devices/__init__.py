"""The devices edgeattn knows: one TOML file per target, and the registry that reads them."""

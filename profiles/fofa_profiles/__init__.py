"""The hardware profiles that ship with fofa-deploy, one TOML file each."""

"""The stages of the talk's pipeline slide: each a module with a frozen `Config` and `run(config, run) -> dict`."""

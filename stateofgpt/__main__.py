"""`python -m stateofgpt` is `sog`."""

from stateofgpt.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

"""``python -m tritonparam`` is the command ``tritonparam``."""

from tritonparam.cli import main

if __name__ == "__main__":
    main()

"""``python -m fofa_deploy`` is ``fofa-deploy``."""

from fofa_deploy.cli import main

if __name__ == "__main__":
    main()

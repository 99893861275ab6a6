"""`python -m hkft`, also under `accelerate launch -m hkft` and `torchrun`."""

from hkft.cli.main import main

if __name__ == "__main__":
    main()

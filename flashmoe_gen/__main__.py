"""``python -m flashmoe_gen``: the same as the command ``flashmoe-gen``."""

from .cli import main

if __name__ == "__main__":
    main()

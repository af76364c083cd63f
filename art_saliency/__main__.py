"""``python -m art_saliency`` is ``art-saliency``."""

import sys

from art_saliency.cli import main

if __name__ == "__main__":
    sys.exit(main())

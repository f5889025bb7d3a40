"""Entry point of `python -m sparsekern`, which is the command `sparsekern`."""

import sys

from .cli.main import main

sys.exit(main())

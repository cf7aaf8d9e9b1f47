"""What the fork server of tests/ranks.py has loaded before a rank starts: DeepSpeed takes seconds to import."""

from wikift.engines.zero import import_deepspeed

import_deepspeed()

"""Models: loaded, adapted, quantised, and run forward."""

import logging

# PEFT imports bitsandbytes where it is installed, which tells of kernels that are not used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

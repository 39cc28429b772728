"""Reading and writing checkpoints of the LLaVA family."""

import logging

from av_llava.checkpoints.quiet import BITSANDBYTES, not_about_the_kernel

# Before PEFT, which all modules here import sooner or later, imports bitsandbytes.
logging.getLogger(BITSANDBYTES).addFilter(not_about_the_kernel)

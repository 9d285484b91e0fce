import logging

__version__ = "0.1.0"

# diffusers imports bitsandbytes, which then warns that a kernel for 4 bits, used nowhere here, isn't installed.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

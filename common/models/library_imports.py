"""What importing diffusers and transformers says and takes."""

import os
import sys


def quiet_libraries() -> None:
    """Keep the libraries' own warnings and bars off the terminal; call before importing them."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("torchax").setLevel(logging.ERROR)
    logging.getLogger("jax").setLevel(logging.ERROR)


def spare_imports(*packages: str) -> None:
    """Let diffusers do without packages that it imports wherever it finds them.

    peft, scipy and transformers take two fifths of the time to import a UNet, which needs none of
    them. Call before diffusers' classes are imported, and only in a process that does one run:
    diffusers takes the packages for missing from then on, and a later run may need them.
    """
    import diffusers.utils

    if "diffusers.models.modeling_utils" in sys.modules:
        return  # it has them already
    for package in packages:
        setattr(diffusers.utils.import_utils, f"_{package}_available", False)
    if "peft" in packages:
        # Asked for at every call of a UNet, whose LoRAs it would scale.
        diffusers.utils.USE_PEFT_BACKEND = False

"""What importing diffusers takes, each looked at in a process of its own."""

import os
import subprocess
import sys

from tests.conftest import PROJECT_DIR

SPARED = """
import sys
import torch
from common.models.library_imports import spare_imports
spare_imports("peft", "scipy", "transformers")
from diffusers import UNet2DConditionModel
spared = {"peft", "scipy", "transformers.modeling_utils"}  # what of it takes long
assert not spared & sys.modules.keys(), spared & sys.modules.keys()
unet = UNet2DConditionModel.from_pretrained("models/demo/unet").eval()
x, prompt = torch.ones(1, 4, 16, 16), torch.ones(1, 77, 160)
added = {"text_embeds": torch.ones(1, 96), "time_ids": torch.ones(1, 6)}
with torch.no_grad():
    assert unet(x, 1, prompt, added_cond_kwargs=added).sample.isfinite().all()
assert not spared & sys.modules.keys(), spared & sys.modules.keys()
"""
TOO_LATE = """
import diffusers.utils
from diffusers import UNet2DConditionModel
from common.models.library_imports import spare_imports
before = vars(diffusers.utils.import_utils).copy(), diffusers.utils.USE_PEFT_BACKEND
spare_imports("peft", "scipy", "transformers")
assert before == (vars(diffusers.utils.import_utils), diffusers.utils.USE_PEFT_BACKEND)
"""
QUIET = """
import os, warnings
os.environ["DIFFUSERS_VERBOSITY"] = "info"
from common.models.library_imports import quiet_libraries
quiet_libraries()
assert os.environ["DIFFUSERS_VERBOSITY"] == "info"  # the user's own word
assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"
warnings.warn("not heard")
import transformers
transformers.logging.get_logger("transformers.x").warning("not heard")
"""


def run(code: str) -> "subprocess.CompletedProcess[str]":
    names = ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=PROJECT_DIR,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    return result


def test_a_unet_runs_without_the_packages_that_are_spared() -> None:
    run(SPARED)


def test_nothing_is_taken_from_diffusers_once_it_has_it() -> None:
    run(TOO_LATE)


def test_libraries_are_quiet_and_the_users_own_word_stays() -> None:
    result = run(QUIET)
    assert "not heard" not in result.stdout + result.stderr

"""All groups of settings that a run has, in the order of the help page.

Each is declared in the package whose settings they are; this is the one list of them.
"""

from common.conditions.prompt_settings import AskedPrompts
from common.conditions.sizes import AskedSize
from common.conditions.table import CONDITIONS
from common.declared import Settings, declarations
from common.models.model_settings import LoraSettings, ModelSettings
from common.sampling.sampling_settings import SamplingSettings
from common.vae.input_settings import AskedInputs, InputSettings
from common.vae.vae_settings import VaeSettings

# What is asked for in one form, and resolved into another one.
ASKED: list[type[Settings]] = [AskedPrompts, AskedInputs, AskedSize]
# What means the same before and after it is resolved.
SHARED: list[type[Settings]] = [
    *(condition.settings for condition in CONDITIONS if condition.settings is not None),
    InputSettings,
    SamplingSettings,
    ModelSettings,
    LoraSettings,
    VaeSettings,
]


def own_settings() -> list[str]:
    """The settings that a prompt may have of its own."""
    groups = (*ASKED, *SHARED)
    return [name for g in groups for name, declared in declarations(g) if declared.of_prompts]

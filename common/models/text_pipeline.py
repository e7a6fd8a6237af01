"""diffusers' pipeline with the text parts alone, and what is taught to it."""

import inspect
import json
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from common.declared import EMBEDDINGS
from common.models.checkpoint import Checkpoint
from common.models.component_table import COMPONENTS, component, text_encoders
from common.models.lora import fuse_into_text_encoders, lora_settings
from common.models.model_settings import LoraFile, TokenFile
from common.models.textual_inversion import embedding_settings, teach
from common.models.weight_files import read_weights
from common.models.weights import find_all_weights, reading

if TYPE_CHECKING:
    import torch

Loaded = TypeVar("Loaded")


class KeepsModels(Protocol):
    """What keeps models from one run of a process to the next, as `compute.kept.Kept` does."""

    def model(self, key: Hashable, load: Callable[[], Loaded]) -> Loaded: ...


def open_text_pipeline(
    kept: KeepsModels,
    checkpoint: Checkpoint,
    dtype: str,
    loras: Sequence[LoraFile],
    embeddings: Sequence[TokenFile],
) -> Any:
    """The text pipeline with LoRAs fused and textual inversions taught; kept by their content.

    Args:
        dtype: of the text encoders, such as "float32".
    """

    of_loras = lora_settings(loras, text_encoders())

    def load() -> Any:
        import torch

        # What is added to weights is added before they are rounded.
        read_in = torch.float32 if of_loras else getattr(torch, dtype)
        pipeline = load_text_pipeline(checkpoint, read_in)
        if of_loras:
            fuse_into_text_encoders(pipeline, checkpoint, loras, getattr(torch, dtype))
        teach(pipeline, embeddings)
        return pipeline

    content = {
        "pipeline": checkpoint.pipeline_class,
        "force_zeros_for_empty_prompt": checkpoint.index().get("force_zeros_for_empty_prompt"),
        "weights": checkpoint.fingerprints_for(EMBEDDINGS),
        "dtype": dtype,
        "loras": of_loras,
        "embeddings": embedding_settings(embeddings),
    }
    return kept.model(("text pipeline", json.dumps(content, sort_keys=True)), load)


def import_text_classes(checkpoint: Checkpoint) -> None:
    """Import what `load_text_pipeline` needs, which takes longer than small weights do."""
    import diffusers
    import transformers

    getattr(diffusers, checkpoint.pipeline_class)
    for name in checkpoint.components_for(EMBEDDINGS):
        getattr(transformers, checkpoint.index()[name][1])


def load_text_pipeline(checkpoint: Checkpoint, dtype: "torch.dtype") -> Any:
    """diffusers' own pipeline with the text parts alone, for its `encode_prompt`."""
    import diffusers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    pipeline_class = getattr(diffusers, checkpoint.pipeline_class)
    options = _without_others(pipeline_class, checkpoint)
    parts = {
        name: _load_part(checkpoint, name, dtype) for name in checkpoint.components_for(EMBEDDINGS)
    }
    return pipeline_class(**options, **parts)


def embeddings_names(pipeline: Any) -> tuple[str, ...]:
    """The tensors that a pipeline's UNet needs, in the order that `encode_prompt` returns them."""
    names: tuple[str, ...] = ("prompt_embeds", "negative_prompt_embeds")
    if has_two_encoders(pipeline):
        names += ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return names


def has_two_encoders(pipeline: Any) -> bool:
    """Whether a text pipeline is SDXL's."""
    return pipeline.__class__.__name__ == "StableDiffusionXLPipeline"


def room_of(pipeline: Any) -> int:
    """The tokens of one chunk between its start and its end token: 75."""
    return int(first_tokenizer(pipeline).model_max_length) - 2


def first_tokenizer(pipeline: Any) -> Any:
    """The tokenizer of the first text encoder; SDXL's refiner has the second one's alone."""
    return pipeline.tokenizer or pipeline.tokenizer_2


def _without_others(pipeline_class: Any, checkpoint: Checkpoint) -> dict[str, Any]:
    """What a pipeline is told so that it does without all parts but the text's."""
    takes = inspect.signature(pipeline_class.__init__).parameters
    own = checkpoint.components_for(EMBEDDINGS)
    options: dict[str, Any] = {
        row.name: None for row in COMPONENTS if row.name in takes and row.name not in own
    }
    if checkpoint.pipeline_class == "StableDiffusionXLPipeline":
        forced = checkpoint.index().get("force_zeros_for_empty_prompt", True)
        return options | {"force_zeros_for_empty_prompt": forced, "add_watermarker": False}
    return options | {"requires_safety_checker": False}


def _load_part(checkpoint: Checkpoint, name: str, dtype: "torch.dtype") -> Any:
    """A tokenizer or text encoder."""
    import torch
    import transformers

    source = checkpoint.source(name)
    with reading(source):
        part_class = getattr(transformers, checkpoint.index()[name][1])
        if not component(name).has_weights:
            return part_class.from_pretrained(source.folder, local_files_only=True)
        # Attention named, so that no config can have another kind fetched from a hub.
        own_attention = {"attn_implementation": "sdpa"}
        config = part_class.config_class.from_pretrained(
            source.folder, local_files_only=True, **own_attention
        )
        with torch.device("meta"):
            module = part_class(config)
        weights = read_weights(find_all_weights(checkpoint, name, module).places, dtype)
        return part_class.from_pretrained(
            None,
            config=config,
            state_dict=dict(weights),
            dtype=dtype,
            **own_attention,
        )

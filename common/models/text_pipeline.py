"""diffusers' pipeline with the text parts alone, and what is taught to it."""

import inspect
import json
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from common.declared import EMBEDDINGS
from common.errors import BadInputFileError
from common.models.checkpoint import Checkpoint
from common.models.component_table import COMPONENTS, component, text_encoders
from common.models.lora import lora_settings, parts_of, plan_fusion
from common.models.model_settings import LoraFile, TokenFile
from common.models.textual_inversion import embedding_settings, teach
from common.models.weights import read_model, reading

if TYPE_CHECKING:
    import torch

Loaded = TypeVar("Loaded")
Shared = TypeVar("Shared")
# Weights of text encoders: the encoder's name → theirs
_Weights = dict[str, dict[str, Any]]


class KeepsModels(Protocol):
    """What keeps models from one run of a process to the next, as `compute.kept.Kept` does."""

    def variant(
        self,
        base: Hashable,
        added: Hashable,
        share: Callable[[Sequence[Loaded]], Shared],
        load: Callable[[Shared], Loaded],
    ) -> Loaded: ...


class _Taught(NamedTuple):
    """A text pipeline, and those of its weights that nothing is added to."""

    pipeline: Any
    own: _Weights


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

    def load(own: _Weights) -> _Taught:
        import torch

        pipeline = load_text_pipeline(checkpoint, getattr(torch, dtype), loras, own)
        teach(pipeline, embeddings)
        for name, weights in own.items():
            encoder = getattr(pipeline, name)
            own[name] = {key: each for key, each in weights.items() if _has(encoder, key, each)}
        return _Taught(pipeline, own)

    base = {
        "pipeline": checkpoint.pipeline_class,
        "force_zeros_for_empty_prompt": checkpoint.index().get("force_zeros_for_empty_prompt"),
        "weights": checkpoint.fingerprints_for(EMBEDDINGS),
        "dtype": dtype,
    }
    added = {
        "loras": lora_settings(loras, text_encoders()),
        "embeddings": embedding_settings(embeddings),
    }
    base_key, added_key = (json.dumps(each, sort_keys=True) for each in (base, added))
    return kept.variant(("text pipeline", base_key), added_key, _share, load).pipeline


def _share(alike: Sequence[_Taught]) -> _Weights:
    shared: _Weights = {}
    for taught in alike:
        for name, weights in taught.own.items():
            shared.setdefault(name, {}).update(weights)
    return shared


def import_text_classes(checkpoint: Checkpoint) -> None:
    """Import what `load_text_pipeline` needs, which takes longer than small weights do."""
    import diffusers
    import transformers

    getattr(diffusers, checkpoint.pipeline_class)
    for name in checkpoint.components_for(EMBEDDINGS):
        getattr(transformers, checkpoint.index()[name][1])


def load_text_pipeline(
    checkpoint: Checkpoint,
    dtype: "torch.dtype",
    loras: Sequence[LoraFile] = (),
    own: _Weights | None = None,
) -> Any:
    """diffusers' own pipeline with the text parts alone, for its `encode_prompt`.

    Args:
        loras: what is added to the text encoders' weights.
        own: the checkpoint's weights of each text encoder that are there; it is made those that
            nothing is added to.

    Raises:
        BadInputFileError: a file does not fit, or changes a text encoder that is not there.
    """
    import diffusers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    pipeline_class = getattr(diffusers, checkpoint.pipeline_class)
    options = _without_others(pipeline_class, checkpoint)
    own, names = {} if own is None else own, checkpoint.components_for(EMBEDDINGS)
    for name in (each for each in text_encoders() if each not in names):
        if added := [lora for lora in loras if name in parts_of(lora)]:
            raise BadInputFileError(
                f"--lora {added[0].file} changes {name}, which this checkpoint does not have: "
                "choose a LoRA for this family"
            )
    parts = {
        name: _load_encoder(checkpoint, name, dtype, loras, own.setdefault(name, {}))
        if component(name).has_weights
        else _load_tokenizer(checkpoint, name)
        for name in names
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


def _load_tokenizer(checkpoint: Checkpoint, name: str) -> Any:
    import transformers

    source = checkpoint.source(name)
    with reading(source):
        part_class = getattr(transformers, checkpoint.index()[name][1])
        return part_class.from_pretrained(source.folder, local_files_only=True)


def _load_encoder(
    checkpoint: Checkpoint,
    name: str,
    dtype: "torch.dtype",
    loras: Sequence[LoraFile],
    own: dict[str, Any],
) -> Any:
    """A text encoder; `own` as `load_text_pipeline` takes it."""
    import torch
    import transformers

    source = checkpoint.source(name)
    with reading(source):
        part_class = getattr(transformers, checkpoint.index()[name][1])
        # Attention named, so that no config can have another kind fetched from a hub.
        own_attention = {"attn_implementation": "sdpa"}
        config = part_class.config_class.from_pretrained(
            source.folder, local_files_only=True, **own_attention
        )
        with torch.device("meta"):
            module = part_class(config)
    fusion = plan_fusion(name, module, checkpoint, loras)
    fusion.leave(own)
    weights = dict(read_model(checkpoint, name, module, dtype, fusion, but=own)) | own
    with reading(source):
        encoder = part_class.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=dtype,
            **own_attention,
        )
    # Of their own, since a parameter of a module gets other data where tokens are added.
    own.update((key, weight.detach()) for key, weight in encoder.named_parameters())
    fusion.leave(own)
    return encoder


def _has(encoder: Any, name: str, weight: Any) -> bool:
    return bool(encoder.get_parameter(name).data_ptr() == weight.data_ptr())

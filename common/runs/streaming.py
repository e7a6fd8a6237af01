"""Pictures that are decoded while stage 2 denoises others (`--stream`)."""

import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from common.compute.backends import Backend
from common.errors import BadSettingError
from common.files.artifacts import Artifact, TensorLayout
from common.files.contracts import latents_shapes
from common.files.row_places import size_in
from common.files.rows_to_come import ComingRows, RowsToCome
from common.files.stage_table import DENOISE
from common.messages import say
from common.models.checkpoint import Checkpoint
from common.runs.generation import GenerationConfig
from common.runs.image_latents import find_pasted_into
from common.runs.picture_writer import PictureWriter
from common.runs.pictures import Found, MadeBeside, PictureFacts, Pictures
from common.runs.recipes import pictures_recipe
from common.runs.stage_run import StageRun

if TYPE_CHECKING:
    from common.vae.decoder import Decoder
    from common.vae.pasting import PastedInto

LATENTS = "latents"
SECONDS_BETWEEN_LOOKS = 0.2


def decode_beside(
    run: StageRun, config: GenerationConfig, checkpoint: Checkpoint
) -> MadeBeside | None:
    """Decode and write what stage 2 finishes, group by group, until it has ended.

    Pictures that are there stay. What is left — what stage 2 took from an earlier run, grids, the
    report — is done as in every run. None where `--stream` is not given.

    Raises:
        BadSettingError: with options that measure, or several processes.
        BadInputFileError: stage 2 ended before all was denoised.
    """
    if not run.given.flags.stream:
        return None
    _refuse_unfit(run)
    backend = run.start_backend(torch_on_cpus=True)
    run.import_libraries("peft", "scipy", "transformers")
    backend.import_vae()
    run.report.phase("other")
    to_come, made = RowsToCome(run.run_dir, DENOISE), _Beside(run, config, checkpoint, backend)
    for group in _groups(run, to_come):
        made.put(to_come, group)
    made.end()
    to_come.refuse_unfinished()
    return made.made()


def _refuse_unfit(run: StageRun) -> None:
    for what in ("profile", "repeat", "distributed"):
        if getattr(run.options, what):
            raise BadSettingError(f"--stream does not go with --{what}: leave one of both out")
    if run.run_dir.resolve() != run.source_dir.resolve():
        raise BadSettingError(
            "--stream reads what stage 2 keeps in the run directory: leave --input_dir out"
        )


def _groups(run: StageRun, to_come: RowsToCome) -> Iterator[ComingRows]:
    """Groups as they are finished, until this process holds the run directory alone."""
    while True:
        is_last = run.lock.is_alone()  # before the last look
        yield from to_come.new_groups(LATENTS)
        if is_last:
            return
        with run.report.part("waiting"):
            time.sleep(SECONDS_BETWEEN_LOOKS)


class _Beside:
    """The pictures of a run whose latents are still being made."""

    def __init__(
        self, run: StageRun, config: GenerationConfig, checkpoint: Checkpoint, backend: Backend
    ) -> None:
        self._run, self._config, self._checkpoint = run, config, checkpoint
        self._backend = backend
        self._writer: PictureWriter | None = None
        self._decoder: Decoder
        self._into: PastedInto
        self._counts: Counter[str] = Counter()  # of all images, by their latents' endings
        self._there: set[str] = set()  # fingerprints of pictures that an earlier run made
        self._fingerprints: set[str] = set()

    def put(self, to_come: RowsToCome, group: ComingRows) -> None:
        """Decode and write what of a group is not there."""
        from common.vae.decoding import Latents, decode_groups, groups_of

        writer = self._writer or self._open(to_come, group)
        latents, pictures = group.tensors[LATENTS].numpy(), writer.pictures  # [N, C, h, w]
        for row, data_sha256 in zip(group.rows, group.data_sha256, strict=True):
            pictures.settle(row, data_sha256)
            to_come.note(row, group.making)
        missing = [
            k for k, row in enumerate(group.rows) if pictures.fingerprints[row] not in self._there
        ]
        if not missing:
            return
        decoder, options = self._decoder, self._run.options
        # As many at once as of all images of this size.
        size = decoder.runner.group_size(self._counts[to_come.ending(group.rows[0])], options)
        writer.made_by = options.made_by(decoder.runner.facts(), size)
        read, todo = Latents.in_memory(latents), [group.places[k] for k in missing]
        rows = iter([group.rows[k] for k in missing])
        for some, pixels in decode_groups(decoder, read, groups_of(todo, size), options, bar=False):
            own = [next(rows) for _ in some.own]
            writer.put(own, self._into.paste(own, pixels))
            self._fingerprints |= {pictures.fingerprints[row] for row in own}

    def _open(self, to_come: RowsToCome, first: ComingRows) -> PictureWriter:
        """Open the decoder, and get ready to write, when the shape of latents is known."""
        from common.vae.loading import VaeToLoad, open_decoder
        from common.vae.pasting import PastedInto

        run, config, checkpoint = self._run, self._config, self._checkpoint
        assert to_come.header is not None
        rows = to_come.header.rows
        say(f"{run.stage.name}: decode {len(rows)} image(s) as they are denoised")
        self._counts = Counter(row.ending for row in rows)
        tensors = {
            f"{LATENTS}{ending}": TensorLayout("F32", (count, *self._shape(ending, first)))
            for ending, count in self._counts.items()
        }
        latents = Artifact(
            path=to_come.path, header=to_come.header, data_sha256="", tensors=tensors
        )
        verify = run.options.verify
        begun = find_pasted_into(config, checkpoint, run.source_dir, verify=verify)
        dtype = self._backend.choose_dtype(config.vae_dtype, force_float32=checkpoint.upcasts_vae)
        recipe = pictures_recipe(config, checkpoint, latents, dtype, begun)
        pictures = Pictures.of(config, recipe, latents, begun)
        vae = VaeToLoad(checkpoint=checkpoint, dtype=dtype, tile=config.tile)
        self._decoder = open_decoder(
            run.kept, self._backend.name, vae, latents_shapes(latents), run.options, run.report
        )
        self._into = PastedInto.of(begun, pictures.prompt_of)
        facts = PictureFacts(config=config, header=latents.header, overrides=run.overrides)
        self._writer = PictureWriter(run.run_dir, pictures, facts, run.report)
        if run.takes_rows:
            self._take_known(to_come, pictures)
        return self._writer

    def _shape(self, ending: str, first: ComingRows) -> tuple[int, ...]:
        """Of latents of a size, [C, h, w], by those of the first group."""
        channels, *cells = first.tensors[LATENTS].shape[1:]
        if ending:
            cells = [side // self._checkpoint.vae_scale_factor for side in size_in(ending)]
        return (channels, *cells)

    def _take_known(self, to_come: RowsToCome, pictures: Pictures) -> None:
        """Let pictures stand in their places whose latents an earlier file has, before others take
        these places.
        """
        assert self._writer is not None and to_come.header is not None
        for row, known in to_come.known_rows().items():
            pictures.settle(row, known)
        found = Found(self._run.run_dir, pictures.names)
        self._there = {str(record.get("fingerprint")) for record in found.records.values()}
        self._writer.take(found.places(pictures))

    def end(self) -> None:
        """Stage 2 has ended: list what is there."""
        if self._writer is not None:
            self._writer.write_index()
            say(f"  {len(self._fingerprints)} decoded while stage 2 ran")

    def made(self) -> MadeBeside | None:
        """What was decoded, and how; None where nothing was."""
        if not self._fingerprints:
            return None
        runner = self._decoder.runner
        return MadeBeside(
            fingerprints=self._fingerprints,
            dtype=str(runner.dtype).removeprefix("torch."),
            facts=runner.facts(),
        )

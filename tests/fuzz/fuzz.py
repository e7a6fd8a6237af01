"""Give the stages damaged and hostile files, and see that each ends with a sentence and its code.

    python tests/fuzz/fuzz.py --cases 20000 --processes 200

In process each case goes through a stage's own `main` up to the point where models would be loaded;
the processes run whole. A case that ends with a traceback, with exit code 1, with more than one
line or too late is kept as a file; `tests/fuzz/regressions` holds those that were found and mended.
"""

import contextlib
import dataclasses
import io
import json
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn
from unittest.mock import patch

PROJECT_DIR = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(PROJECT_DIR))

# Stage 0's, whose import is not to count as a case's time.
import diffusers.models.autoencoders.autoencoder_kl  # noqa: F401
import numpy as np
import typer
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from tqdm import tqdm

from common import process
from common.files import run_files
from common.files.artifacts import HEADER_KEY
from common.files.recipe import Recipe
from common.files.stage_table import (
    EMBEDDINGS_FILE,
    IMAGE_LATENTS_FILE,
    LATENTS_FILE,
    STAGES,
    TRAJECTORY_FILE,
    numbered,
)
from common.models import text_pipeline
from common.runs import generation
from common.runs.stage_run import ResidentStage
from common.sampling import loading as sampling_loading
from common.vae import loading as vae_loading

SCRIPTS = {stage.number: PROJECT_DIR / "stages" / stage.script for stage in STAGES}
CODES = (0, 2, 3, 4, 5)
SECONDS_IN_PROCESS, SECONDS_OF_A_PROCESS = 20, 240
MOST_MEMORY = 2 * 10**9
MEASURED = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
CONFIG = run_files.GENERATION_CONFIG_FILE
COMPONENT_CONFIGS = ("model_index.json", "unet/config.json", "vae/config.json",
                     "scheduler/scheduler_config.json", "text_encoder/config.json")  # fmt: skip
# Of a run that begins with pictures: one of each format, each with its mask.
PICTURES = ("picture.png", "picture.jpg", "picture.webp")
MASKS = ("mask.png", "mask.jpg", "mask.webp")
BEGUN_CONFIG = f"begun/{CONFIG}"
OF_PICTURES = (*PICTURES, *MASKS, IMAGE_LATENTS_FILE, BEGUN_CONFIG)
WAYS_TO_LAY = (
    *(("--resize_mode", mode) for mode in ("fill", "crop")),
    *(("--padding_mask_crop", pixels) for pixels in ("0", "8", "8192")),
    ("--soft_mask",),
)
# What is damaged, and the stages that read it.
TARGETS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys((*PICTURES, *MASKS), (0, 0, 1)),
    BEGUN_CONFIG: (0, 2),
    IMAGE_LATENTS_FILE: (2, 3),
    EMBEDDINGS_FILE: (2,),
    LATENTS_FILE: (3,),
    TRAJECTORY_FILE: (3,),
    CONFIG: (2, 3),
    "settings.yaml": (1,),
    "prompts.txt": (1,),
    "prompts.jsonl": (1,),
    **dict.fromkeys((f"checkpoint/{name}" for name in COMPONENT_CONFIGS), (0, 1, 2, 3)),
}
SEEDS_OF_TEXTS = {
    "settings.yaml": "prompt: [a red star, a ring]\nheight: 128\nscheduler: euler\nseed: 3\n"
    "scheduler_options: {use_karras_sigmas: true}\nloras: []\nguidance_scale: 5.0\n",
    "prompts.txt": "a red star\na green ring\n",
    "prompts.jsonl": '{"prompt": "a star", "negative_prompt": null, "seed": 5, "image": null}\n'
    '{"prompt": "b", "mask_image": null}\n',
}


class ModelsReachedError(Exception):
    """The stage accepted its input and would now load models."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One file in place of the good one, and the stage that is to read it."""

    stage: int
    target: str
    content: bytes
    flags: tuple[str, ...] = ()

    def name(self, code: int, what: str) -> str:
        """What the case's file is called; `of_file` reads it."""
        return f"stage{self.stage}.exit{code}.{self.target.replace('/', '+')}.{what}"

    @classmethod
    def of_file(cls, path: Path) -> tuple["Case", int]:
        """A case that was kept, and the exit code that it should have."""
        match = re.fullmatch(r"stage(\d)\.exit(\d)\.(.+)\.\w+", path.name)
        assert match is not None, f"{path.name} is not named as cases are"
        return cls(int(match[1]), match[3].replace("+", "/"), path.read_bytes()), int(match[2])


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a stage ended, and what it said of its failure."""

    code: int
    said: str


class Folders:
    """A finished run and its checkpoint, in which one file at a time is replaced."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = folder / "checkpoint"
        shutil.copytree(PROJECT_DIR / "models" / "demo", self.checkpoint)
        self.run_dir, self.begun = folder / "run", folder / "begun"
        self._make(self.run_dir, "--save_trajectory", "1")
        self.begun.mkdir()
        flags = ["--keep_unmasked"]
        for flag, names in (("--image", PICTURES), ("--mask_image", MASKS)):
            pixels = np.arange(128 * 128 * 3, dtype=np.uint32).astype(np.uint8)
            picture = Image.fromarray(pixels.reshape(128, 128, 3))
            for name in names:
                path = self.begun / name
                (picture if flag == "--image" else picture.convert("L")).save(path)
                flags += [flag, str(path)]
        self._make(self.begun, *flags)
        for name, text in SEEDS_OF_TEXTS.items():
            (self.run_dir / name).write_text(text, encoding="utf-8")

    def _make(self, run_dir: Path, *flags: str) -> None:
        run_all = [sys.executable, str(PROJECT_DIR / "tools" / "run_all.py")]
        always = ["--output_dir", str(run_dir), "--model_id", str(self.checkpoint)]
        made = subprocess.run(
            [*run_all, *always, "--num_inference_steps", "2", *flags],
            capture_output=True,
            text=True,
        )
        assert made.returncode == 0, made.stderr

    def path(self, target: str) -> Path:
        """Where a target's file stands."""
        if target in OF_PICTURES:
            return self.begun / Path(target).name
        inside = target.removeprefix("checkpoint/")
        return self.run_dir / target if inside == target else self.checkpoint / inside

    def good(self) -> dict[str, bytes]:
        """What every target holds when nothing is wrong."""
        return {target: self.path(target).read_bytes() for target in TARGETS}

    @contextlib.contextmanager
    def holding(self, case: Case) -> Iterator[list[str]]:
        """Put a case's file in place. Yields the stage's arguments."""
        path = self.path(case.target)
        before = path.read_bytes()
        out = self.run_dir.parent / "out"
        arguments = ["--output_dir", str(out)]
        if case.stage != 1:
            begun = case.target in OF_PICTURES or case.stage == 0
            arguments += ["--input_dir", str(self.begun if begun else self.run_dir)]
        else:
            arguments += ["--model_id", str(self.checkpoint)]
        if case.target == "settings.yaml":
            arguments = ["--output_dir", str(out), "--config", str(path)]
        elif case.target.startswith("prompts."):
            arguments += ["--prompts_file", str(path)]
        elif case.stage == 1 and case.target in (*PICTURES, *MASKS):
            kind = path.suffix
            for flag, name in (("--image", "picture"), ("--mask_image", "mask")):
                arguments += [flag, str(self.begun / f"{name}{kind}")]
        try:
            path.write_bytes(case.content)
            yield [*arguments, *case.flags]
        finally:
            path.write_bytes(before)
            shutil.rmtree(out, ignore_errors=True)


# --- what is put in place ------------------------------------------------------------------------

NASTY_TEXT = ("", "\0", "\ud800", "a" * 5000, "../../etc/passwd", "/", "~", "%s{}", "\u202e", "\n",
              "a/b", "1e999", "NaN", "file.safetensors", "🙂", "-1", "0", "null")  # fmt: skip
NASTY_NUMBERS = (0, -1, 1, 2**31, 2**63, 2**64, 10**30, -(10**30), 1e308, float("inf"),
                 float("nan"), 0.5, 10**400)  # fmt: skip
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NASTY_NUMBERS),
    st.integers(),
    st.floats(),
    st.sampled_from(NASTY_TEXT),
    st.text(max_size=20),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=6,
)
DEEP = b"[" * 100_000
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def mutate_bytes(content: bytes, chance: random.Random) -> bytes:
    """Flip, cut, insert, repeat or overwrite; most often near the start, where headers are."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        reach = chance.choice((16, 400, 4000, len(data)))
        at = chance.randrange(max(1, min(reach, len(data)) or 1))
        kind = chance.randrange(8)
        length = chance.choice((1, 2, 8, 64, 1000))
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = chance.randbytes(length)
        elif kind == 4:
            data[at:at] = data[at : at + length]
        elif kind == 5:
            data[at : at + 8] = chance.choice(
                (b"\xff" * 8, b"\0" * 8, b"\xff" * 7 + b"\x7f", len(data).to_bytes(8, "little"))
            )
        elif kind == 6:
            data[at:at] = chance.choice(
                (
                    b"[" * 3000,
                    b'{"a":' * 3000,
                    b"\xed\xa0\x80",
                    b"&a *a ",
                    b"!!python/object:os.system ",
                    b"\\ud800",
                    b"1e999",
                    b"9" * 5000,
                    b"NaN",
                    b"Infinity",
                    b'"',
                    b": ",
                    b"\n- ",
                )
            )
        else:
            data[at : at + length] = chance.randbytes(length)
    return bytes(data)


def mutate_value(value: Any, draw: Callable[[Any], Any], chance: random.Random) -> Any:
    """Replace, remove or add something, anywhere in a JSON value."""
    here = not isinstance(value, dict | list) or not value or chance.random() < 0.15
    if here:
        return draw(VALUES)
    if isinstance(value, dict):
        key = chance.choice(sorted(value))
        kind = chance.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.2:
            return value | {draw(st.text(max_size=8)): draw(VALUES)}
        return value | {key: mutate_value(value[key], draw, chance)}
    at = chance.randrange(len(value))
    if chance.random() < 0.2:
        return value[:at] + value[at + 1 :] * chance.choice((1, 2))
    return [*value[:at], mutate_value(value[at], draw, chance), *value[at + 1 :]]


def dump(value: Any) -> bytes:
    """JSON as Python writes it, numbers included that JSON does not have."""
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(value).encode()
    finally:
        sys.set_int_max_str_digits(4300)


def mutate_safetensors(content: bytes, draw: Callable[[Any], Any], chance: random.Random) -> bytes:
    """Change the layout or our header in a file that stays a safetensors file.

    Half of the changed headers are signed again, as somebody would who knows this program.
    """
    length = int.from_bytes(content[:8], "little")
    layout, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    if chance.random() < 0.4:
        layout = mutate_value(layout, draw, chance)
    else:
        header = json.loads(layout["__metadata__"][HEADER_KEY])
        part = chance.choice(("recipe", "recipe", "recipe", "provenance", None))
        if part is None:
            header = mutate_value(header, draw, chance)
        else:
            header[part] = mutate_value(header[part], draw, chance)
        if chance.random() < 0.5:
            with contextlib.suppress(Exception):
                header["fingerprint"] = Recipe(**header["recipe"]).fingerprint()
        layout["__metadata__"][HEADER_KEY] = dump(header).decode()
    text = dump(layout)
    return len(text).to_bytes(8, "little") + text + data


def mutate_picture(content: bytes, chance: random.Random) -> bytes:
    """Another picture: of any mode and size, animated, a bomb, a format that is not read."""
    size = chance.choice(((128, 128), (128, 128), (1, 1), (1, 500), (127, 129), (16, 8000)))
    kind = chance.choice(("PNG", "PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "MPO", "ICO"))
    mode = chance.choice(("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16", "F", "CMYK", "YCbCr"))
    channels = {"LA": 2, "RGB": 3, "RGBA": 4, "I": 4, "I;16": 2, "F": 4, "CMYK": 4, "YCbCr": 3}
    data = chance.randbytes(size[0] * size[1] * channels.get(mode, 1))
    image = Image.frombytes(mode, size, data) if mode != "1" else Image.new("1", size, 1)
    options: dict[str, Any] = {}
    if chance.random() < 0.2:
        options |= {"save_all": True, "append_images": [image, image]}
    if chance.random() < 0.3:
        exif = Image.Exif()
        exif[0x0112] = chance.choice((0, 1, 3, 6, 8, 9, 65535))
        options["exif"] = exif.tobytes()
    if chance.random() < 0.3:
        options["icc_profile"] = chance.choice((b"", b"x" * 200, SRGB[:100], SRGB))
    file = io.BytesIO()
    with contextlib.suppress(OSError, ValueError, KeyError):  # no mode of that format
        image.save(file, format=kind, **options)
    made = bytearray(file.getvalue() or content)
    if made[:4] == b"\x89PNG" and chance.random() < 0.3:  # other sizes in a header that fits
        made[16:24] = b"".join(
            chance.choice((0, 1, 128, 30_000, 2**31 - 1, 2**32 - 1)).to_bytes(4, "big")
            for _ in range(2)
        )
        made[29:33] = zlib.crc32(made[12:29]).to_bytes(4, "big")
    return bytes(made)


def mutate_json_text(content: bytes, draw: Callable[[Any], Any], chance: random.Random) -> bytes:
    """Change the value in a JSON file."""
    return dump(mutate_value(json.loads(content), draw, chance))


def mutate_yaml_text(content: bytes, draw: Callable[[Any], Any], chance: random.Random) -> bytes:
    """Give settings by their real names values that they cannot have, or can."""
    names = st.sampled_from([*generation.RunSettings.model_fields, "unknown"])
    values = yaml.safe_load(content) | draw(st.dictionaries(names, VALUES, max_size=3))
    if chance.random() < 0.5:
        values = {chance.choice(sorted(values)): draw(VALUES)}
    return yaml.safe_dump(values, allow_unicode=True).encode("utf-8", "surrogatepass")


def mutate_lines(content: bytes, draw: Callable[[Any], Any], chance: random.Random) -> bytes:
    """Change single lines of a file of prompts, as JSON objects or as text."""
    lines = content.splitlines()
    at = chance.randrange(len(lines))
    try:
        lines[at] = dump(mutate_value(json.loads(lines[at]), draw, chance))
    except ValueError:
        lines[at] = draw(st.text(max_size=400)).encode("utf-8", "surrogatepass")
    return b"\n".join(lines)


@st.composite
def cases(draw: Any, good: dict[str, bytes]) -> Case:
    """A case, by a structure that hypothesis draws or by bytes that are changed at random."""
    target = draw(st.sampled_from(sorted(good)))
    stage = draw(st.sampled_from(TARGETS[target]))
    chance = random.Random(draw(st.integers(0, 2**32 - 1)))
    content = good[target]
    if chance.random() < 0.5:
        content = mutate_bytes(content, chance)
    elif target in (*PICTURES, *MASKS):
        content = mutate_picture(content, chance)
    elif target.endswith(".safetensors"):
        content = mutate_safetensors(content, draw, chance)
    elif target.endswith(".json"):
        content = mutate_json_text(content, draw, chance)
    elif target.endswith(".yaml"):
        content = mutate_yaml_text(content, draw, chance)
    else:
        content = mutate_lines(content, draw, chance)
    if chance.random() < 0.005:
        content = DEEP
    flags: list[str] = []
    if stage != 1 and chance.random() < 0.3:
        flags.append("--no_verify")
    if stage == 0 and chance.random() < 0.5:
        flags += chance.choice(WAYS_TO_LAY)
    return Case(stage, target, content, tuple(flags))


# --- how it is run -------------------------------------------------------------------------------


def _stop_before_models(*_: object, **__: object) -> NoReturn:
    raise ModelsReachedError


@contextlib.contextmanager
def models_out_of_reach() -> Iterator[None]:
    """Let every stage end where it would load models."""
    with (
        patch.object(text_pipeline, "open_text_pipeline", _stop_before_models),
        patch.object(sampling_loading, "open_denoiser", _stop_before_models),
        patch.object(vae_loading, "open_decoder", _stop_before_models),
        patch.object(vae_loading, "open_encoder", _stop_before_models),
    ):
        yield


def _too_late(_: int, __: FrameType | None) -> NoReturn:
    raise TimeoutError(f"no end after {SECONDS_IN_PROCESS} s")


def run_here(folders: Folders, case: Case) -> Ended:
    """Run a case in this process. 0 stands for input that was accepted."""
    resident = ResidentStage(numbered(case.stage))  # which leaves the process's libraries whole
    with folders.holding(case) as arguments:
        signal.signal(signal.SIGALRM, _too_late)
        signal.alarm(SECONDS_IN_PROCESS)
        try:
            with (
                contextlib.redirect_stderr(io.StringIO()),
                contextlib.redirect_stdout(io.StringIO()),
            ):
                code, said = process.run_in_process(resident.command, arguments, "python stage.py")
        finally:
            signal.alarm(0)
    if code == 1 and said is not None and ModelsReachedError.__name__ in said:
        return Ended(0, "")
    return Ended(code, said or "")


def run_a_process(folders: Folders, case: Case) -> Ended:
    """Run a case as users do."""
    with folders.holding(case) as arguments:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPTS[case.stage]), *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        try:
            _, said = process.communicate(timeout=SECONDS_OF_A_PROCESS)
        except subprocess.TimeoutExpired:
            process.kill()
            return Ended(1, f"no end after {SECONDS_OF_A_PROCESS} s")
    lines = [line for line in said.splitlines() if not line.startswith("warning: ")]
    return Ended(process.returncode, "\n".join(line.removeprefix("error: ") for line in lines))


def what_is_wrong(ended: Ended) -> str | None:
    """Why the way a stage ended is not as documented; None where it is."""
    if ended.code not in CODES:
        return f"ended with {ended.code}: {ended.said[-600:]}"
    if (ended.code == 0) != (ended.said == ""):
        return f"ended with {ended.code} and said {ended.said[-600:]!r}"
    if "\n" in ended.said or "Traceback" in ended.said:
        return f"said more than a sentence: {ended.said[-600:]!r}"
    return None


@dataclasses.dataclass
class Found:
    """What was seen: how often each code, and what was wrong."""

    kept_in: Path
    codes: Counter[int] = dataclasses.field(default_factory=Counter)
    wrong: list[str] = dataclasses.field(default_factory=list)

    def take(self, case: Case, ended: Ended) -> None:
        """Count an end, and keep the case where it was wrong."""
        self.codes[ended.code] += 1
        wrong = what_is_wrong(ended)
        if wrong is None:
            return
        self.kept_in.mkdir(parents=True, exist_ok=True)
        path = self.kept_in / case.name(ended.code, f"found_{len(self.wrong):04d}")
        path.write_bytes(case.content)
        self.wrong.append(f"{path}: {wrong}")


def for_each_case(
    count: int, number: int, good: dict[str, bytes], run: Callable[[Case], None]
) -> None:
    """Draw so many cases, and run each."""

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(good))
    def run_cases(case: Case) -> None:
        run(case)

    run_cases()


def fuzz_here(folders: Folders, count: int, number: int, found: Found) -> None:
    """Run so many cases in this process."""
    with models_out_of_reach(), tqdm(total=count, desc="in process", disable=None) as bar:

        def run(case: Case) -> None:
            found.take(case, run_here(folders, case))
            bar.update()

        for_each_case(count, number, folders.good(), run)


def fuzz_processes(folders: list[Folders], count: int, number: int, found: Found) -> None:
    """Run so many cases as whole processes, one at a time in each folder.

    Of those that would be accepted only such are run that cannot ask for hours of work.
    """
    chosen: list[Case] = []

    def choose(case: Case) -> None:
        harmless = case.target.endswith(".safetensors") or case.target.startswith("prompts.")
        if len(chosen) < count and (harmless or run_here(folders[0], case).code != 0):
            chosen.append(case)

    with models_out_of_reach():
        for_each_case(2 * count, number, folders[0].good(), choose)
    waiting = {id(each): chosen[k :: len(folders)] for k, each in enumerate(folders)}
    with (
        ThreadPoolExecutor(len(folders)) as pool,
        tqdm(total=len(chosen), desc="processes", disable=None) as bar,
    ):

        def run(own: Folders) -> None:
            for case in waiting[id(own)]:
                found.take(case, run_a_process(own, case))
                bar.update()

        for task in [pool.submit(run, each) for each in folders]:
            task.result()


def main(
    cases: Annotated[int, typer.Option("--cases", help="In this process.")] = 20_000,
    processes: Annotated[int, typer.Option("--processes", help="As whole processes.")] = 200,
    seed: Annotated[int, typer.Option("--seed", help="Of the cases.")] = 0,
    jobs: Annotated[int, typer.Option("--jobs", help="Processes at once.")] = 2,
    kept_in: Annotated[
        Path, typer.Option("--kept_in", help="Folder for cases that end wrongly.")
    ] = PROJECT_DIR / "stage_outputs" / "fuzz",
) -> None:
    """Run damaged and hostile files through the stages; ends with 1 where anything was wrong."""
    found = Found(kept_in)
    with tempfile.TemporaryDirectory() as folder:
        folders = [Folders(Path(folder) / str(k)) for k in range(jobs)]
        if cases:
            fuzz_here(folders[0], cases, seed, found)
        if processes:
            fuzz_processes(folders, processes, seed + 1, found)
    for line in found.wrong:
        print(line)
    most = max(resource.getrusage(who).ru_maxrss * 1024 for who in MEASURED)
    codes = ", ".join(f"{count} × {code}" for code, count in sorted(found.codes.items()))
    print(
        f"{cases} cases in process and {processes} processes, seed {seed}: exit codes {codes}; "
        f"most memory {most / 1e9:.2f} GB; {len(found.wrong)} ended wrongly"
    )
    raise typer.Exit(bool(found.wrong) or most > MOST_MEMORY)


if __name__ == "__main__":
    typer.run(main)

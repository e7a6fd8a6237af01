"""docs/files.md: every layout of files that is read or refused, from the tests' own lists.

python -m tests.files_page
"""

from collections.abc import Iterator

from tests.conftest import PROJECT_DIR
from tests.models import (
    test_tensor_files,
    test_text_pipeline,
    test_textual_inversion,
    test_weight_files,
)
from tests.models.lora_files import FORMATS
from tests.runs import test_prompts_file

PAGE = PROJECT_DIR / "docs" / "files.md"
HEAD = """# Files that people download

Each row is a test with a file that the test makes; `python -m tests.files_page` writes this page.
What of a file is not used is named in a warning; a file that cannot be used ends the stage with a
sentence.

| file | layout | |
|---|---|---|
"""


def rows() -> Iterator[tuple[str, str, str]]:
    """What is in each row: which file, its layout, whether it is read."""
    for kind in FORMATS:
        parts = ", ".join(name.replace("_", " ") for name in kind.modules)
        yield "`--lora`", f"{kind.title} ({parts})", "read"
    for layout in test_weight_files.LAYOUTS:
        yield f"`--{layout.component}`", layout.title, "read"
    for title, _, _ in test_text_pipeline.LAYOUTS:
        yield "`--model_id` in one file", f"text encoders: {title}", "read"
    yield "`--vae`", "a decoder alone", "read"
    yield "`--vae`", "`AutoencoderTiny` (TAESD), its folder or its file beside its config", "read"
    yield "`--vae`", "`AutoencoderTiny` (TAESD), a file without a config", "refused"
    yield "`--unet`", "`v_pred`, `ztsnr`, `edm_mean`, `edm_vpred.sigma_max` beside weights", "read"
    yield "`--unet`", "`modelspec.prediction_type` in the metadata (SD 2.x)", "read"
    yield "`--unet`", "of five channels (depth) and other unknown widths", "refused"
    yield "`--embedding`", "one tensor, named by its word or by none", "read"
    for layout_of_two in test_textual_inversion.LAYOUTS:
        yield "`--embedding`", f"two text encoders: {layout_of_two}", "read"
    yield "`--embedding`", "a file for each text encoder, with the same word", "read"
    yield "`--embedding`", "of another family", "refused"
    for name, _ in test_prompts_file.FORMS:
        yield "`--prompts_file`", f"`{name}`" if "." in name else f"JSON lines {name}", "read"
    yield "`--prompts_file`", "UTF-8, UTF-8 and UTF-16 with their marks", "read"
    for words in test_tensor_files.INSTEAD.values():
        what = words.partition(":")[0].partition(",")[0].partition(" (")[0]
        yield "any of these", f"a file that {what}", "refused"
    yield "any of these", "a pickle (`.ckpt`, `.pt`, `.bin`) under another name", "refused"


def page() -> str:
    """The whole page."""
    return HEAD + "".join(f"| {file} | {layout} | {how} |\n" for file, layout, how in rows())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(PROJECT_DIR)}")

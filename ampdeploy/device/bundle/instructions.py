"""README.md of a bundle: the exact commands for the device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jinja2 import Environment, StrictUndefined

from ampdeploy.config import ENGINE_TARGETS
from ampdeploy.device.bundle.archive import PREFIX, SUFFIX
from ampdeploy.device.bundle.contents import BANK, CHECKSUM, GOLDENS

_TEMPLATE = """\
# {{ model }} at {{ image_size }} px, for {{ target }}

Packed by ampdeploy. It holds the model as an ONNX graph ({{ precision }}) and what proves, on the
device, that what is built from it computes the right thing. There is no engine in it: an engine
fits the GPU, TensorRT and platform it is built with, so the device builds its own.

## On the device

1. Python 3.10 or newer, and a copy of ampdeploy's sources. torch, timm and onnx are not needed.
{% if target == "trt" %}

   On a Jetson (JetPack 6.1 or newer), whose TensorRT comes with the system and is never replaced
   by pip's:

       sudo apt-get install tensorrt python3-libnvinfer python3-venv
       python3 -m venv --system-site-packages ~/ampdeploy-venv
       ~/ampdeploy-venv/bin/pip install ./ampdeploy 'cuda-python>=12.6,<13'

   with `cuda-python<14` on JetPack 7 (CUDA 13). On another NVIDIA machine:

       python3 -m venv ~/ampdeploy-venv
       ~/ampdeploy-venv/bin/pip install './ampdeploy[trt]'
{% elif target == "trt-rtx" %}

       python3 -m venv ~/ampdeploy-venv
       ~/ampdeploy-venv/bin/pip install './ampdeploy[trt-rtx]'
{% else %}

       python3 -m venv ~/ampdeploy-venv
       ~/ampdeploy-venv/bin/pip install ./ampdeploy {{ runtime }}
{% endif %}

2. See what the machine can do:

       ~/ampdeploy-venv/bin/ampdeploy doctor

3. Build, test, compare and install:

       ~/ampdeploy-venv/bin/ampdeploy engine {{ name }} --target {{ target }}

   It stops at the first step that fails, and what was installed before stays as it was:

   - every file is compared with its SHA-256;
   - {{ what }};
   - {{ golden_images }} golden images go through it; the first percentile of the cosine to the
     float32 outputs must be {{ min_cosine_p1 }} or more;
   - it is put into `{{ installed }}`, next to this bundle. What was there before becomes
     `{{ installed }}.previous`;
   - it is timed against `{{ baseline_onnx }}`, the unpruned model, in turn; if that fails, what was
     installed stays.

   Killed in the middle, the same command goes on. Another folder: `--out FOLDER`. Without the
   comparison, which takes memory and time: `--no-compare`.
{% if builds %}

   Without TensorRT, on any machine: ONNX Runtime takes the graph as it is, and all else is as
   above.

       ~/ampdeploy-venv/bin/pip install onnxruntime
       ~/ampdeploy-venv/bin/ampdeploy engine {{ name }} --target ort
{% endif %}

{% if known_bugs %}
## Known bugs of TensorRT that this model may meet

The device looks them up for its own TensorRT, and does or says what is needed:

{% for note in known_bugs %}
- {{ note }}
{% endfor %}

{% endif %}
## In your application

    import ampdeploy

    with ampdeploy.open_model("{{ installed }}") as model:
        features = model(["a.jpg", "b.jpg"])["features"]  # (2, C), float32

Reading pictures takes Pillow (`pip install pillow`); they are prepared to the bit as they were in
training. Arrays that are prepared already go to `model.runner.run`.

## What is in it

| file | content |
|---|---|
| `bundle.json`, `{{ checksum }}` | what every file must be; `sha256sum --check {{ checksum }}` |
| `{{ onnx }}` | the pruned model |
| `{{ baseline_onnx }}` | the unpruned model in the same precision |
| `{{ goldens }}` | preprocessed images, float32, and the outputs of the float32 model |
{% if bank_images %}
| `{{ bank }}` | float32 features of {{ bank_images }} labelled images, for k-NN on the device |
{% endif %}

Images are prepared so: {{ image_size }} x {{ image_size }} px, {{ preprocessing.interpolation }},
crop {{ preprocessing.crop_pct }} ({{ preprocessing.crop_mode }}), then normalised with
mean {{ preprocessing.mean | join(", ") }} and
standard deviation {{ preprocessing.std | join(", ") }}.
{% if packed_as_tar %}

The `.tar` can be given to `ampdeploy engine` as it is, or unpacked with `tar -xf` (into
`{{ prefix }}`) first.
{% endif %}
"""


def instructions(name: str, facts: dict[str, Any], known_bugs: Iterable[str] = ()) -> str:
    """The README of the bundle called `name`.

    Args:
        name: Of the folder or of the ``.tar``.
        facts: The fields of its manifest that are known before it is sealed.
        known_bugs: Of TensorRT, that its graphs may meet on some device; a sentence each.
    """
    target, onnx = facts["target"], facts["onnx"]
    builds = target in ENGINE_TARGETS
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, autoescape=False)
    text = environment.from_string(_TEMPLATE).render(
        **facts,
        name=name,
        known_bugs=tuple(known_bugs),
        installed=f"{name.removesuffix(SUFFIX)}-engine",
        packed_as_tar=name.endswith(SUFFIX),
        prefix=PREFIX,
        builds=builds,
        what=f"an engine is built from `{onnx}`" if builds else f"`{onnx}` is taken as it is",
        runtime="onnxruntime-gpu" if target == "ort-cuda" else "onnxruntime",
        goldens=GOLDENS,
        bank=BANK,
        checksum=CHECKSUM,
    )
    return text.rstrip() + "\n"

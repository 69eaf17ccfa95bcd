# SPDX-License-Identifier: Apache-2.0
"""What travels: payload files, their seal, and the header that names who may open them.

- `kinds`: the allow-list of kinds and the files each has.
- `tensors`: the strict safetensors reader and the one writer.
- `adapter`: a LoRA adapter's settings, and the configuration rebuilt from them.
- `oms`: the OMS v1.0 model signature over a payload directory.
- `header`: the public description of a sealed dispatch.
- `container`: payload directory to sealed dispatch and back.

What the statements inside say, and whether they may be believed, is `provenance`.
"""

# SPDX-License-Identifier: Apache-2.0
"""Recipes: how each kind of packet is made, checked, fitted, attached and taken off.

- `base`: the Recipe protocol, the values between its verbs, the registry of kinds. No tensors.
- `facts`: what a statement says about the weights of each kind. No tensors either.
- `organ`, `lora`, `delta`: the kinds that ship.
- `blocks`, `patch`: the two ways to change a model: inserted blocks, changes of weights.
- `factors`: a change of a matrix as quantised directions.
- `attachment`, `stack`, `export`: fitted packets on disk, on a model, and as ordinary snapshots.
- `documents`, `windows`: text files to documents, without tensors; documents to token windows.
- `snapshot`: model directories to models, and their digest.
- `plan`, `loop`, `resume`: how to train, the one training loop, and its resumable state.
- `prefix`: cached outputs of the frozen blocks below an organ.
"""

# SPDX-License-Identifier: Apache-2.0
"""The Merkle log, its checkpoints, witnesses and proofs, and the offline audit."""

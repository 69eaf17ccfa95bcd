# SPDX-License-Identifier: Apache-2.0
"""The contract between our processes; see protos/README.md."""

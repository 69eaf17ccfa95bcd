# SPDX-License-Identifier: Apache-2.0
"""Generated from protos/allograft/wire/v1 by `make proto`."""

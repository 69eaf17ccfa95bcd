# SPDX-License-Identifier: Apache-2.0
"""Site side: the daemon that owns everything private, and its courier."""

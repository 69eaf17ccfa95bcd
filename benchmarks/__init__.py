# SPDX-License-Identifier: Apache-2.0
"""Measurements that README figures come from; each runs as `python -m benchmarks.NAME`."""

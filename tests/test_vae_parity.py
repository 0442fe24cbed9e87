"""Every published version equals the reference implementation's frozen outputs, whole and streamed."""

import mlx.core as mx
import pytest
from vae_cases import VERSIONS, joined, reference_cases, reference_decoder

CASES = [(version, index) for version in VERSIONS for index in range(len(reference_cases(version)))]

# Greatest difference over the greatest magnitude. Asked is 1e-4; measured at most 9.2e-6, where the reference
# takes the sine of a timestep of 250 in float32, and 5.7e-6 elsewhere.
FLOAT32_TOLERANCE = 2e-5

"""States, samplers and likelihoods of masked diffusion models."""

from .config import SamplerConfig as SamplerConfig
from .likelihood import Estimator as Estimator
from .likelihood import Likelihood as Likelihood
from .likelihood import log_likelihood as log_likelihood
from .likelihood import mask_draws as mask_draws
from .samplers import DenoisingLoop as DenoisingLoop
from .samplers import StepEvent as StepEvent
from .samplers import complete as complete
from .samplers import generate as generate
from .states import Encoded as Encoded
from .states import by_length as by_length
from .states import encode as encode
from .states import random_reveal as random_reveal
from .states import role_positions as role_positions
from .states import with_answer as with_answer
from .states import without_prompt as without_prompt

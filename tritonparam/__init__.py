"""Makes a constrained weight cost what an unconstrained one costs in PyTorch."""

from torch.nn.utils.parametrize import ParametrizationList as ParametrizationList
from torch.nn.utils.parametrize import is_parametrized as is_parametrized
from torch.nn.utils.parametrize import type_before_parametrizations as type_before_parametrizations

from tritonparam import functional as functional
from tritonparam.cache import cached as cached
from tritonparam.declared import add_rule as add_rule
from tritonparam.explain import explain as explain
from tritonparam.fuse import fuse as fuse
from tritonparam.fuse import unfuse as unfuse
from tritonparam.links import CayleyMap as CayleyMap
from tritonparam.links import MatrixExponential as MatrixExponential
from tritonparam.links import Pruning as Pruning
from tritonparam.links import Skew as Skew
from tritonparam.links import Symmetric as Symmetric
from tritonparam.orthogonal import Orthogonal as Orthogonal
from tritonparam.orthogonal import OrthogonalGates as OrthogonalGates
from tritonparam.parametrizations import orthogonal as orthogonal
from tritonparam.parametrizations import positive_definite as positive_definite
from tritonparam.parametrizations import skew as skew
from tritonparam.parametrizations import spd as spd
from tritonparam.parametrizations import spectral_norm as spectral_norm
from tritonparam.parametrizations import symmetric as symmetric
from tritonparam.parametrizations import weight_norm as weight_norm
from tritonparam.paths import stats as stats
from tritonparam.paths import use_path as use_path
from tritonparam.preimage import NoPreimage as NoPreimage
from tritonparam.register import register_parametrization as register_parametrization
from tritonparam.register import remove_parametrizations as remove_parametrizations
from tritonparam.register import (
    transfer_parametrizations_and_params as transfer_parametrizations_and_params,
)
from tritonparam.registry import alias as alias
from tritonparam.rnn import orthogonal_gates as orthogonal_gates
from tritonparam.tuner import tune as tune

"""Evidence → posterior → weights within the policy's bounds. Plain Python on a handful of floats."""

from hhh_router.routing.gate import GATES, posterior
from hhh_router.routing.project import kl_nats, project, tilt, weigh

__all__ = ["GATES", "kl_nats", "posterior", "project", "tilt", "weigh"]

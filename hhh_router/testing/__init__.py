"""Stand-ins for the model, for testing policies and applications without one."""

from hhh_router.testing.fakes import FakeGenerator, FakeReader, fake_pipeline, make_scores

__all__ = ["FakeGenerator", "FakeReader", "fake_pipeline", "make_scores"]

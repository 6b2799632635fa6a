from tests.experiments.conftest import make_config, tiny_model  # noqa: F401 (fixtures)

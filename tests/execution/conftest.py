from tests.study.conftest import study, study_file  # noqa: F401

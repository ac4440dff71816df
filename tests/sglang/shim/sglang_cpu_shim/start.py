"""A server's processes as forks of its first one. Each would import SGLang again, which takes 8 s of a CPU."""

import multiprocessing
import os

from sglang_cpu_shim import is_plain_cpu

AFRESH = "SGLANG_CPU_SHIM_START_AFRESH"  # in the environment: as on GPUs, whose drivers do not survive a fork


def install() -> None:
    """Plugin: let SGLang fork its scheduler and its detokenizer. They load all plugins by themselves, as they do when they start afresh."""
    if not is_plain_cpu() or AFRESH in os.environ or multiprocessing.parent_process() is not None:
        return
    from sglang.srt import plugins
    from sglang.srt.entrypoints import engine

    prepare = engine._set_envs_and_config

    def prepare_to_fork(server_args):
        prepare(server_args)
        multiprocessing.set_start_method("fork", force=True)

    engine._set_envs_and_config = prepare_to_fork
    os.register_at_fork(after_in_child=lambda: setattr(plugins, "_plugins_loaded", False))

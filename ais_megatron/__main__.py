"""``python -m ais_megatron``: the same as the ``ais-megatron`` command. Import-safe: dist_checkpointing spawns processes."""

from ais_megatron.cli import main

if __name__ == "__main__":
    main()

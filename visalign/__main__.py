"""`python -m visalign`, for launchers that start modules: torchrun -m visalign eval ..."""

from visalign.commands.cli import main

if __name__ == "__main__":
    main()

"""``python -m dinov3_ray``: the same as ``dinov3-ray``."""

from dinov3_ray.cli import main

if __name__ == "__main__":
    main()

"""`python -m kfac_ext`: what is compiled and what runs where."""

from kfac_ext import build_info

if __name__ == "__main__":
    for key, value in build_info().items():
        print(f"{key:20} {value}")

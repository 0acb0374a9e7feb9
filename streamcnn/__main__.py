"""``python -m streamcnn``, where the command ``streamcnn`` is not on the path."""

from streamcnn.cli import main

if __name__ == "__main__":
    main()

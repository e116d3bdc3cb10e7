"""Chat with a model. The program is tools/chat.py."""

import trainlib.core.threads  # noqa: F401  # Before torch.

from tools.chat import main

if __name__ == "__main__":
    main()

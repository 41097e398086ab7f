"""Exit 0 when the server of this container answers 200: ``health.py PATH [PORT]``. Standard library alone."""

import http.client
import sys

path, port = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 8000
try:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=4)  # unlike urllib it asks no HTTP_PROXY
    connection.request("GET", path)
    answer = connection.getresponse()
    print(answer.status, answer.read(1000).decode(errors="replace"))
    sys.exit(answer.status != 200)
except OSError as error:
    sys.exit(f"127.0.0.1:{port} does not answer: {error}")

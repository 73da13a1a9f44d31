"A server for tests, on a thread: it answers as it is told, and keeps what it was asked."

import json
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace


class Server(ThreadingHTTPServer):
    request_queue_size = 64


@contextmanager
def fake_server(answer):
    """A namespace with `url` and `asked`, the list of requests (number, method, path, headers, body).

    `answer(request)` returns a dict (status 200, as JSON), or (status, headers, bytes), or None to hang up. Instead of
    the bytes it may give a function that returns them, called when the headers are sent.
    """
    asked, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            request = SimpleNamespace(method=self.command, path=self.path, headers=dict(self.headers), body=body)
            with lock:
                asked.append(request)
                request.number = len(asked)
            found = answer(request)
            if found is None:
                return self.connection.close()
            status, headers, content = (200, {}, json.dumps(found).encode()) if isinstance(found, dict) else found
            with suppress(ConnectionError):
                self.send_response(status)
                length = {} if callable(content) else {"Content-Length": str(len(content))}
                for header in (length | headers).items():
                    self.send_header(*header)
                self.end_headers()
                self.wfile.write(content() if callable(content) else content)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", asked=asked)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

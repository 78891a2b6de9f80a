# The server on a CPU, with the built-in model unless another is named:
#
#   docker build -t manyheads .
#   docker run --rm -p 127.0.0.1:8000:8000 manyheads
#   docker run --rm -p 127.0.0.1:8000:8000 -v manyheads:/home/manyheads manyheads serve MODEL --host 0.0.0.0
#
# The volume keeps what it downloads. Inside a container the server must listen on all addresses (--host 0.0.0.0), and -p
# says who reaches it: beyond this machine, give it a key (-e MANYHEADS_API_KEY=...).

FROM python:3.13-slim

# PyTorch's own index has a torch for CPUs; the one that pip takes otherwise brings CUDA, some gigabytes.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# With a C compiler, models in float32 and GGUF files run on kernels that are made for the processor at the first start.
RUN apt-get update && apt-get install --no-install-recommends -y gcc libc6-dev && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 manyheads
WORKDIR /build
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY manyheads manyheads
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" -c constraints.txt .

USER 1000
WORKDIR /home/manyheads
EXPOSE 8000
HEALTHCHECK --start-period=10m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["manyheads"]
CMD ["serve", "--host", "0.0.0.0"]

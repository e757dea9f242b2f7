# The command line in a container: for CPU, or for an accelerator by an extra of pyproject.toml.
#
#   docker build -t pushpull_jax .
#   docker build -t pushpull_jax:cuda --build-arg EXTRA=cuda .
#   docker run --rm -v "$PWD/data:/data" -v "$PWD/runs:/runs" pushpull_jax \
#       train quick --data.root /data --data.category bottle --workdir /runs/bottle
FROM python:3.12-slim
ARG EXTRA=""
WORKDIR /opt/pushpull_jax
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY pushpull_jax pushpull_jax
COPY configs configs
RUN pip install --no-cache-dir -c constraints.txt ".${EXTRA:+[$EXTRA]}"
WORKDIR /
# Not through a shell, so that SIGTERM reaches it: it saves the state and ends with 75.
ENTRYPOINT ["pushpull"]

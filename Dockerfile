# docker build -t lightning_easgd . && docker run --rm --shm-size=1g lightning_easgd
# Trains four workers by elastic averaging on real images. With other settings:
# docker run --rm --shm-size=1g -v "$PWD/outputs:/lightning_easgd/outputs" lightning_easgd make train ARGS="strategy.tau=16"
FROM python:3.12-slim

RUN apt-get update && apt-get install --yes --no-install-recommends make && rm -rf /var/lib/apt/lists/*

# A user of its own: nothing here needs root.
RUN useradd --create-home easgd && mkdir /lightning_easgd && chown easgd /lightning_easgd
USER easgd
WORKDIR /lightning_easgd

# What is installed depends on these alone: a change of the code elsewhere does not install again.
COPY --chown=easgd pyproject.toml constraints.txt Makefile README.md LICENSE ./
COPY --chown=easgd lightning_easgd lightning_easgd
COPY --chown=easgd conf conf
RUN make .venv/.installed

COPY --chown=easgd . .
# Copied files are newer or older than the stamp, as it happens; what they hold has been installed.
RUN touch .venv/.installed

CMD ["make", "train"]

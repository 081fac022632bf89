// Calls the gateway with connect-node, a third HTTP/2 stack, in the way that the first argument names; prints one line of JSON.
const { readFileSync } = require('node:fs');
const { createFileRegistry, fromBinary, toJson } = require('@bufbuild/protobuf');
const { FileDescriptorSetSchema } = require('@bufbuild/protobuf/wkt');
const { Code, ConnectError, createClient } = require('@connectrpc/connect');
const { createGrpcTransport } = require('@connectrpc/connect-node');

const { DESCRIPTORS, TORCHRELAY_ADDRESS, TORCHRELAY_API_KEY, TORCHRELAY_MODEL } = process.env;
const registry = createFileRegistry(fromBinary(FileDescriptorSetSchema, readFileSync(DESCRIPTORS)));
const service = registry.getService('torchrelay.v1.GenerationService');
const client = createClient(service, createGrpcTransport({ baseUrl: `http://${TORCHRELAY_ADDRESS}` }));
const headers = { authorization: `Bearer ${TORCHRELAY_API_KEY}` };
const text = { input: { case: 'text', value: 'The capital of France is' } };

async function stream(config, onText) {
  const controller = new AbortController();
  const found = { text: '' };
  try {
    const request = { model: TORCHRELAY_MODEL, input: text, config };
    for await (const { event } of client.streamGenerate(request, { headers, signal: controller.signal })) {
      if (event.event.case === 'accepted') found.generationId = event.event.value.generationId;
      if (event.event.case !== 'deltas') continue;
      for (const delta of event.event.value.deltas) found.text += delta.text;
      if (onText) onText(controller);
    }
  } catch (error) {
    found.code = Code[ConnectError.from(error).code];
  }
  return found;
}

const calls = {
  async generate() {
    const response = await client.generate({ model: TORCHRELAY_MODEL, input: text, config: { maxTokens: 4 } }, { headers });
    return toJson(service.method.generate.output, response, { registry }).generation;
  },
  stream: () => stream({ maxTokens: 8 }),
  cancel: () => stream({ maxTokens: 1000, ignoreEos: true }, (controller) => controller.abort()),
  refused: () => stream({ temperature: 9 }),
};
calls[process.argv[2]]().then((found) => console.log(JSON.stringify(found)));

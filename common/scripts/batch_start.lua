#!lua
-- Makes a batch of the items that are kept, unless the tenant has one of the same idempotency key, or too many.
-- ARGV  1 items  2 idempotency digest or ''  3 request digest  4 most batches of the tenant  5 retention ms
--       6 ms that it may run  7 whose it is  8 priority class  9 name  10 salt
-- Reply {OK} | {DUPLICATE, id} | {REUSED} | {TOO_MANY} | {LOST}. A repeat changes nothing.
--@include batches
if call('EXISTS', B) == 1 then
  call('HSET', B, 'sa', ARGV[10]) -- a wait for replicas covers what its connection wrote
  return { 'OK' }
end
local index, digest_key = P .. 'batches', P .. 'bi:' .. ARGV[2]
if ARGV[2] ~= '' then
  local id, digest = string.match(call('GET', digest_key) or '', '^(%S+) (.*)$')
  if id and call('EXISTS', P .. 'b:' .. id) == 1 then
    call('DEL', B .. ':items')
    if digest ~= ARGV[3] then return { 'REUSED' } end
    return { 'DUPLICATE', id }
  end
end
for _, id in ipairs(call('ZRANGE', index, 0, -1)) do
  if call('EXISTS', P .. 'b:' .. id) == 0 then call('ZREM', index, id) end
end
if call('ZCARD', index) >= tonumber(ARGV[4]) then
  call('DEL', B .. ':items')
  return { 'TOO_MANY' }
end
if call('LLEN', B .. ':items') ~= tonumber(ARGV[1]) then return { 'LOST' } end

local now = now_ms()
local kept = int(ARGV[5] + ARGV[6])
call('HSET', B, 'st', 'R', 'total', ARGV[1], 'ok', 0, 'er', 0, 'ca', 0, 'ru', 0, 'hw', 0, 'ep', 0, 'ho', '', 'le', 0,
  'cr', int(now), 'dl', int(now + ARGV[6]), 'rt', ARGV[5], 'ik', ARGV[2], 'ow', ARGV[7], 'pr', ARGV[8], 'nm', ARGV[9],
  'sa', ARGV[10])
call('PEXPIRE', B, kept)
call('PEXPIRE', B .. ':items', kept)
call('ZADD', index, int(now), ID)
call('PEXPIRE', index, kept)
if ARGV[2] ~= '' then call('SET', digest_key, ID .. ' ' .. ARGV[3], 'PX', kept) end
return { 'OK' }

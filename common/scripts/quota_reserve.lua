#!lua
-- Reserves a request and its tokens in the quotas of a tenant and of one of its credentials: all of them or none.
-- Rates by the generic cell rate algorithm (GCRA, ITU-T I.371): of each rate one time is stored, at which all that was
-- admitted so far will have drained; a request is admitted while that time lies at most a minute ahead. So a minute's
-- worth may come at once, and then as much as drains.
-- KEYS  1 {t:<tenant>}:quota, hash: "r" and "t" of the tenant, "r:<quota id>" and "t:<quota id>" of a credential, in ms
-- ARGV  1 reservation id  2 tokens  3 ms that the reservation is kept
--       4 tenant's requests a minute, tokens a minute, tokens a day, with spaces between; 0 is no limit
--       5 quota id of the credential  6 its limits likewise
-- Reply {OK} | {TOO_LARGE | QUOTA_EXCEEDED, owner, limit's name, limit} | {RATE_LIMITED, owner, limit's name, limit, ms
--       after which this very request is admitted, if no other is}. A repeat of a reservation id changes nothing.
-- The reservation, {t:<tenant>}:r:<id>, for quota_settle: "tokens day <quota id or ->", the six limits, and of each of the
-- rates r, t, r:<id>, t:<id> when its share will have drained and what had been given back of the rate by then ("g" and the
-- rate's field): what is given back later is no more than what has not drained yet.
local call = redis.call
local P = string.sub(KEYS[1], 1, -6)
local WINDOW_MS, DAY_MS = 60000, 86400000
local time = call('TIME')
local now = time[1] * 1000 + time[2] / 1000
local tokens = tonumber(ARGV[2])
local reservation = P .. 'r:' .. ARGV[1]
if call('EXISTS', reservation) == 1 then return { 'OK' } end

local day = string.format('%d', math.floor(now / DAY_MS))
local day_key = P .. 'd:' .. day
local writes, spent, shares = {}, {}, {}
local worst, wait = nil, 0

-- Adds `amount` to a rate; notes the longest wait among those that do not admit it.
local function take(field, owner, name, limit, amount)
  local interval = WINDOW_MS / limit
  local stored, given = unpack(call('HMGET', KEYS[1], field, 'g' .. field))
  -- Never more than a minute ahead: it was stored before the server's clock went back.
  local drained = math.max(now, math.min(tonumber(stored or 0), now + WINDOW_MS)) + amount * interval
  shares[field] = string.format('%.3f', drained) .. ' ' .. (given or '0')
  writes[#writes + 1] = field
  writes[#writes + 1] = string.format('%.3f', drained)
  local late = drained - now - WINDOW_MS
  if late > 0.001 and late > wait then -- mutant: rate
    worst, wait = { 'RATE_LIMITED', owner, name, limit }, late
  end
end

for i, owner in ipairs({ 'tenant', 'key' }) do
  local suffix = i == 1 and '' or ':' .. ARGV[5]
  local rpm, tpm, tpd = string.match(ARGV[i == 1 and 4 or 6], '^(%d+) (%d+) (%d+)$')
  rpm, tpm, tpd = tonumber(rpm), tonumber(tpm), tonumber(tpd)
  if tpm > 0 and tokens > tpm then return { 'TOO_LARGE', owner, 'tokens_per_minute', tpm } end
  if tpd > 0 then
    if tokens > tpd then return { 'TOO_LARGE', owner, 'tokens_per_day', tpd } end
    local used = tonumber(call('HGET', day_key, 'tokens' .. suffix) or 0)
    if used + tokens > tpd then return { 'QUOTA_EXCEEDED', owner, 'tokens_per_day', tpd } end
    spent[#spent + 1] = 'tokens' .. suffix
  end
  if rpm > 0 then take('r' .. suffix, owner, 'requests_per_minute', rpm, 1) end
  if tpm > 0 then take('t' .. suffix, owner, 'tokens_per_minute', tpm, tokens) end
end
if worst then
  worst[5] = math.ceil(wait)
  return worst
end

if #writes > 0 then
  call('HSET', KEYS[1], unpack(writes))
  call('PEXPIRE', KEYS[1], 2 * WINDOW_MS)
end
for _, field in ipairs(spent) do call('HINCRBY', day_key, field, tokens) end
if #spent > 0 then call('PEXPIRE', day_key, 2 * DAY_MS) end
local quota_id = ARGV[5] == '' and '-' or ARGV[5]
local record = { ARGV[2], day, quota_id, ARGV[4], ARGV[6] }
for i, field in ipairs({ 'r', 't', 'r:' .. ARGV[5], 't:' .. ARGV[5] }) do record[5 + i] = shares[field] or '0 0' end
call('SET', reservation, table.concat(record, ' '), 'PX', ARGV[3])
return { 'OK' }
